import json

import pytest

from service.cli import main


@pytest.fixture
def study(repository, tmp_path, monkeypatch, capsys):
    where = ("--repository", str(repository), "--model", "tiny", "--cache-dir", str(tmp_path / "cache"))

    def run(command: str, *flags: str):
        monkeypatch.setattr("sys.argv", ["slicewise", command, *where, *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    return run


def test_every_policy_is_timed(study):
    assert study("profile", "--measure-limit-s", "1")[0] == 0
    brief = ("--waiting", "60", "--images", "30", "--rounds", "2", "--workers", "3")
    status, printed = study("scheduler", *brief, "--policies", "gate_slack,slackfit,fixed:narrowest")
    said = json.loads(printed.out)
    assert status == 0
    assert (said["waiting"], said["workers"]) == (60, 3)
    assert set(said["us_per_image"]) == {"gate_slack", "slackfit", "fixed:narrowest"}
    assert min(said["us_per_image"].values()) > 0


@pytest.mark.parametrize(
    ("is_profiled", "flags", "words"),
    [
        (False, (), "allowed: run slicewise profile first"),
        (True, ("--policies", "best"), "policy is 'best'; allowed: "),
    ],
)
def test_what_is_missing_is_named(study, is_profiled, flags, words):
    if is_profiled:
        study("profile", "--measure-limit-s", "1")
    status, printed = study("scheduler", *flags)
    assert status == 2
    assert words in printed.err
