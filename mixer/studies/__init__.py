"""What one question needed. Studies work on the records and figures of a checkout."""

from mixer.system.files import IN_CHECKOUT

if not IN_CHECKOUT:
    raise ImportError(
        "The studies and their notebooks need a checkout: clone the repository and run `pip install -e .` in it.",
        name=__name__,  # by which `python -m` shows the sentence without a traceback
    )
