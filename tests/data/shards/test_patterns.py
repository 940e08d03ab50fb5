import subprocess

import pytest

from pixmim.data.shards.patterns import expand
from pixmim.utils.errors import UserError


@pytest.mark.parametrize(
    "pattern",
    [
        "train-{000000..000146}.tar",
        "{8..11}",
        "{08..11}",
        "{3..-2}",
        "{0..10..3}",
        "{10..1..4}",
        "{a,b,c}/x{1,2}.tar",
        "{a,b{1..3},{c,d}}.tar",
        "plain.tar",
        "{}.tar",
        "{one}.tar",
        "{x,}y",
        "a{b{1,2}c",
        "{a}{b,c}",
    ],
)
def test_as_a_shell_writes_them(pattern: str) -> None:
    by_bash = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand(pattern) == by_bash.stdout.splitlines()


def test_a_slip_of_the_pen_is_refused() -> None:
    with pytest.raises(UserError, match="more than 1,000,000 files"):
        expand("{0..99999999999}.tar")


def test_patterns_beyond_all_measure() -> None:
    long = "{1.." + "9" * 5000 + "}"
    assert expand(long) == [long]  # no number: it stays as it is
    with pytest.raises(UserError, match="too many braces"):
        expand("{a}{b,c}" * 3000)
