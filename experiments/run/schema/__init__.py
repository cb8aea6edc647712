"""What a recipe may say: every table and key, its meaning and its range.

`Recipe` cuts and distils a trained model (`antgmm compress`), `Training` trains a teacher (`antgmm train`).
Tables under a stage, a phase or `evaluate` hold only what differs: `recipe.py` lays them over the table of the same
name at the top. Paths are relative to the folder that the command is started in.
"""

from experiments.run.schema.compress import Recipe
from experiments.run.schema.faults import validated
from experiments.run.schema.stage import Stage, Work, can_score
from experiments.run.schema.tables import Axis, Count, Data, FileData, MaadData, Name, Size, Table
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
    "Recipe",
    "Size",
    "Stage",
    "Table",
    "Training",
    "Work",
    "can_score",
    "validated",
]
