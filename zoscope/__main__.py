"""``python -m zoscope``."""

from zoscope.cli import main

if __name__ == "__main__":
    main()
