"""``python -m ckptman``: the command line."""

from ckptman.cli import main

if __name__ == "__main__":
    main()
