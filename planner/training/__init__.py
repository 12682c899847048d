"""The training step itself, on any device: what `simulate` and `measure` both run.

Nothing in here knows a formula. A new method, optimizer or recipe is added here once.
"""

import logging

# Where it is installed, peft imports it, and it says which optional kernels it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
