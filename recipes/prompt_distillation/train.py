"""The second command of the recipe: train on the replies that `create_data` has written."""

from .__main__ import Config, build, main

__all__ = ["Config", "build", "main"]

if __name__ == "__main__":
    main()
