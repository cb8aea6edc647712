"""The schema of recipes: all tables and keys with their meanings and ranges.

`Recipe` prunes and distils a trained model (`antgmm compress`), `Training` trains a teacher (`antgmm train`). Tables
under a stage, a phase or `evaluate` contain only differences: `recipe.py` merges them with the table of the same name
at the top level. Paths are relative to the working directory.
"""

from experiments.run.schema.compress import Recipe
from experiments.run.schema.faults import validated
from experiments.run.schema.stage import Stage, Work, can_score
from experiments.run.schema.tables import Axis, Count, Data, FileData, MaadData, Name, PreparedData, Size, Table
from experiments.run.schema.train import Model, Phase, Training

__all__ = [
    "Axis",
    "Count",
    "Data",
    "FileData",
    "MaadData",
    "Model",
    "Name",
    "Phase",
    "PreparedData",
    "Recipe",
    "Size",
    "Stage",
    "Table",
    "Training",
    "Work",
    "can_score",
    "validated",
]
