"""``python -m fastcalib``: the same as the console script ``fastcalib``."""

from .cli import main

if __name__ == "__main__":
    main()
