"""`python -m roma_ray`: the command, where nothing puts it on the PATH."""

from roma_ray.cli import main

main()
