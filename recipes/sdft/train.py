"""The recipe `sdft`, under the name that programs of the cookbook use."""

from .__main__ import Config, build, main

__all__ = ["Config", "build", "main"]

if __name__ == "__main__":
    main()
