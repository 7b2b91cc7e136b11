"""`retnet.engine` under its old name, for one release."""

import warnings

from retnet.engine import *  # noqa: F403  all of it
from retnet.engine import __all__ as __all__

warnings.warn("retnet.infer is now retnet.engine; change the import", FutureWarning, stacklevel=2)
