"""Studies, each for one question. They use the records and figures of a checkout."""

from mixer.system.files import IN_CHECKOUT

if not IN_CHECKOUT:
    raise ImportError(
        "The studies and their notebooks need a checkout: clone the repository and run `pip install -e .` in it.",
        name=__name__,  # lets `python -m` show the sentence without a traceback
    )
