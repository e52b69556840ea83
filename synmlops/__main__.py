"""So that `torchrun -m synmlops train` can start the workers."""

from synmlops.cli import main

if __name__ == "__main__":
    main()
