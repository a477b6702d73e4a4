"""The recipe `distillation.multi_teacher`, under the name that programs of the cookbook use."""

from .multi_teacher import Config, build, main

__all__ = ["Config", "build", "main"]

if __name__ == "__main__":
    main()
