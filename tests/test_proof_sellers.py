"""The proof has the right word for each seller: 0 for right, 1 for wrong, 2 where it can't tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sellers import LONG, QUICK, Seller, selling

PROOF = Path(__file__).parents[1] / "proof_of_correctness.py"
RUN_TIMEOUT_S = 200
ALL = os.environ.get("ALL_SELLERS")  # on request: the slow ones too, and every test of each


def prove(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(PROOF), *arguments],
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "seller", QUICK + LONG if ALL else QUICK, ids=lambda seller: seller.__name__
)
def test_each_seller_gets_the_right_word_and_its_reason(seller: type[Seller]) -> None:
    with selling(seller()) as url:
        done = prove("--url", url, *seller.arguments, "--tests", "1-5" if ALL else seller.tests)
    assert done.returncode == seller.word, done.stdout[-3000:]
    assert seller.says in done.stdout
    if seller.word == 2:
        assert done.stdout.splitlines()[-1].startswith("NOT JUDGED: ")
