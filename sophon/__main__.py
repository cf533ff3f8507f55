"""What ``python -m sophon`` runs: the command line."""

from sophon.cli import main

if __name__ == "__main__":
    main()
