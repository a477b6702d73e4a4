"""The recipe `distillation.on_policy`, under the name that programs of the cookbook use."""

from .on_policy import Config, build, main

__all__ = ["Config", "build", "main"]

if __name__ == "__main__":
    main()
