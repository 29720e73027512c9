"""The parts of the documentation that are made from code: one module per page or table.

``python tools/generate_docs.py --write`` puts all of them in place.
"""

import sys
from pathlib import Path

# what is documented is this checkout, not an installed version
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
