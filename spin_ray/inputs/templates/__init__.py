"""Fast rendering of chat templates that only copy texts: Jinja need not run for each row.

``Skeletons.of(template, ask)`` is the only entry. ``write`` returns None where the template must be run. Time saved:
benchmarks/README.md, row 8.
"""

from spin_ray.inputs.templates.skeletons import Skeletons

__all__ = ["Skeletons"]
