"""``python -m qkpatch``."""

from qkpatch.cli import main

if __name__ == "__main__":
    main()
