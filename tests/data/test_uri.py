"""Parsing of --data: parts and weights, absolute paths, Hugging Face fields and brace patterns."""

import subprocess
from pathlib import Path

import pytest

from pixmim.cli.flags import absolute
from pixmim.data.uri import HubSpec, Part, expand_braces, read_parts
from pixmim.utils.errors import UserError


@pytest.fixture(autouse=True)
def _special_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with a plus in its path and folders with special characters in their names."""
    root = tmp_path / "x+y"
    for name in ("a", "b", "a+b", "c*2", "a,b", "shards"):
        (root / name).mkdir(parents=True)
    monkeypatch.chdir(root)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a", [("a", 1)]),
        ("a*3+b", [("a", 3), ("b", 1)]),
        ("a+b", [("a+b", 1)]),  # a folder of that name
        ("a+b*2", [("a", 1), ("b", 2)]),
        ("c*2", [("c*2", 1)]),  # a folder of that name
        ("c*2*3+a", [("c*2", 3), ("a", 1)]),
        ("nosuch*2+b", [("nosuch", 2), ("b", 1)]),
        ("shards/*.tar", [("shards/*.tar", 1)]),
        ("shards/*.tar*2+a", [("shards/*.tar", 2), ("a", 1)]),
        ("a*2+shards/{00..09}.tar*12", [("a", 2), ("shards/{00..09}.tar", 12)]),
        ("*.tar+a", [("*.tar", 1), ("a", 1)]),
        ("shapes:count=10*2+a", [("shapes:count=10", 2), ("a", 1)]),
        ("hf:u/s:train,label=x*2+shapes:", [("hf:u/s:train,label=x", 2), ("shapes:", 1)]),
        ("s3://bucket/x+y/*.tar*2+a", [("s3://bucket/x+y/*.tar", 2), ("a", 1)]),
        ("https://host/a.tar+https://host/b.tar", [("https://host/a.tar", 1), ("https://host/b.tar", 1)]),
    ],
)
def test_parts_and_weights(spec: str, parts: list[tuple[str, int]]) -> None:
    assert read_parts(spec) == [Part(*part) for part in parts]


def test_absolute_changes_only_paths() -> None:
    here = Path.cwd()
    spec = absolute("a*3+hf:u/s:train,label=x+shards/*.tar*2+shapes:count=10+hf:b:test,image=i+s3://x/*.tar+a,b")
    assert spec == (
        f"{here}/a*3+hf:u/s:train,label=x+{here}/shards/*.tar*2+shapes:count=10+hf:{here}/b:test,image=i+s3://x/*.tar"
        f"+{here}/a,b"
    )
    assert absolute(spec) == spec  # the plus in the folder's name does not end a part
    assert absolute("a+b") == f"{here}/a+b" and absolute("") == "" and absolute("~") == str(Path.home())


@pytest.mark.parametrize("weight", ["0", "1.5", ".5", "3."])
def test_a_weight_is_an_integer(weight: str) -> None:
    with pytest.raises(UserError, match=rf"weight {weight} in 'a\*{weight}' is not an integer.*multiply"):
        read_parts(f"a*{weight}+b")


@pytest.mark.parametrize("spec", ["a*2+", "+a*2", "a*2++b"])
def test_an_empty_part_is_named(spec: str) -> None:
    with pytest.raises(UserError, match="a part is missing"):
        read_parts(spec)


def test_hugging_face_fields() -> None:
    spec = "hf:user/set:train,config=en,revision=v1.0,image=photo,label=fine label"
    assert HubSpec.read(spec) == HubSpec("user/set", "train", "en", "v1.0", "photo", "fine label")
    assert str(HubSpec.read(spec)) == spec
    assert HubSpec.read("hf:cifar10") == HubSpec("cifar10") and HubSpec.read("hf:cifar10").path is None
    assert HubSpec.read("hf:a,b:test,label=x") == HubSpec("a,b", "test", label="x")
    assert HubSpec.read("hf:./a").path == Path("a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "'' in 'hf:' is neither a path nor the name"),
        ("hf:u/s/t", "'u/s/t' in 'hf:u/s/t' is neither"),
        ("hf:u/s,label", "neither"),
        ("hf:u/s,lable=x", "no option lable=; did you mean 'label'"),
        ("hf:u/s,label=", "no value for label"),
        ("hf:./nosuch:train", "./nosuch does not exist"),
    ],
)
def test_invalid_hugging_face_fields(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        HubSpec.read(spec)
    assert message in str(caught.value)


def test_absurd_weights_and_names() -> None:
    for digits in (7, 5000):
        with pytest.raises(UserError, match="too large"):
            read_parts(f"a*{'9' * digits}+b")
    with pytest.raises(UserError, match="zero byte"):
        absolute("a\0b")
    assert absolute("~nosuchuser/x") == f"{Path.cwd()}/~nosuchuser/x"


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
        "{a..e}-{x..v..2}",
        "plain.tar",
        "{}.tar",
        "{one}.tar",
        "{x,}y",
        "{a}{b,c}",
    ],
)
def test_braces_expand_as_in_bash(pattern: str) -> None:
    by_bash = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == by_bash.stdout.splitlines()


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}.tar",
        "{0..99999999999999999999}",
        "{0..99999999999\n}",
        "{0..\uff19\uff19\uff19\uff19\uff19\uff19\uff19}",
        "{a,b}" * 40,
        "{x," + "{a,b}" * 40 + "}",
        "{a..z}" * 5,
        "{a{0..999999},b}{c,d}",
    ],
)
def test_more_than_a_million_names_are_refused_before_expansion(pattern: str) -> None:
    with pytest.raises(UserError, match="more than 1,000,000 files"):
        expand_braces(pattern)


def test_alternatives_add_up() -> None:
    assert len(expand_braces("{a/{0..999},b/{0..999},c/{0..999}}")) == 3000


@pytest.mark.parametrize(
    "pattern", ["a{b{1,2}c", "x}", "{1..1000}}{" * 5, "{" * 3000 + "}" * 3000, "{1.." + "9" * 5000 + "}"]
)
def test_a_pattern_that_cannot_be_expanded_is_named(pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_braces(pattern)
    assert pattern[:200] in str(caught.value)
