"""``python -m spin_ray COMMAND``: the command line without its script on the PATH."""

from spin_ray.cli import main

if __name__ == "__main__":
    main()
