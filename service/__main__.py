"""``python -m service``: the same as ``slicewise``."""

from service.cli import main

main()
