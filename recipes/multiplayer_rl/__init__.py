"""Games under the names that programs of the Tinker cookbook import; `recipes.multiturn` runs."""
