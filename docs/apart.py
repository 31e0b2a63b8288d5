"""Couple after the normalisation: outcome and score are normalised apart, then added.

What it teaches: eq. 2 couples r and S, and eq. 3 normalises their sum. The other order is

    A_i = (1 - beta) (r_i - mean r) / std r + beta (S_i - mean S) / std S

Here the score has the weight beta in every group. In eq. 3 it has more where outcomes differ
little. What we could read of the paper leaves the order open; docs/choices.md compares the two.

Run it:  python docs/apart.py --beta 0.4 --credit aim     # options as of train.py; 2 to 4 minutes
         python docs/experiments.py --run apart           # the runs of docs/choices.md
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train          # first: it says how idle threads wait, before torch is there
import mapo
from torch import Tensor

coupled_before = mapo.advantages


def advantages(r: Tensor, scores: Tensor, looked: Tensor, group: int, beta: float, *others
               ) -> Tensor:
    """As mapo.advantages, with any credit. beta 0 is the outcome alone, beta 1 the score alone."""
    of_outcome, of_score = (coupled_before(r, scores, looked, group, only, *others)
                            for only in (0., 1.))
    return (1 - beta) * of_outcome + beta * of_score


if __name__ == "__main__":
    mapo.advantages = advantages
    config = train.parse_config()
    if mapo.ALGORITHMS[config.algo].critic:
        sys.exit("apart.py: expected an algorithm with a group advantage, found ppo")
    if config.out == f"runs/{train.run_name(config)}":
        config.out += "-apart"
    train.train(config)
