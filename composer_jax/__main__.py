"""`python -m composer_jax` is `composer`."""

import sys

from composer_jax.cli import main

sys.exit(main())
