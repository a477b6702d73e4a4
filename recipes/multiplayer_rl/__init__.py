"""Games as programs of the Tinker cookbook import them; the recipe is `recipes.multiturn`."""
