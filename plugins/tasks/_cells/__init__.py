"""Cells: runs inside a task, such as the cells of a paper's table.

``cell`` says what a cell is and measures one, ``work`` measures many: each in a process of its own, several
side by side, from what an earlier try has left where the settings are the same.
"""

from servelab.plugins.tasks._cells.cell import Cell, CellResult, Found, measure
from servelab.plugins.tasks._cells.work import Work

__all__ = ["Cell", "CellResult", "Found", "Work", "measure"]
