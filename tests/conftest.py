import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy():
    """The committed agent. Tests that change weights load their own."""
    from policy import Policy
    return Policy(ROOT / "tiny")


@pytest.fixture(scope="session")
def questions():
    from data import World, world_questions
    return world_questions(World(), seed=0, split="test", start=0, count=6)


@pytest.fixture(scope="session")
def trajectories(policy, questions):
    """24 sampled trajectories of 1 to 4 turns."""
    from rollout import collect
    return collect(policy, questions, group=4, generator=torch.Generator().manual_seed(0))
