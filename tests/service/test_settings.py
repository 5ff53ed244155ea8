import pytest
from pydantic import ValidationError

from service import settings as settings_module
from service.settings import Settings, quota_cores, unknown_variables, usable_cores


def settings(*arguments):
    return Settings(_cli_parse_args=list(arguments))


def test_a_flag_wins_over_a_variable_which_wins_over_the_default(monkeypatch):
    assert settings().port == 8000
    monkeypatch.setenv("SLICEWISE_PORT", "9000")
    assert settings().port == 9000
    assert settings("--port", "9001").port == 9001


def test_the_operating_point_is_an_index_or_absent(monkeypatch):
    assert settings().operating_point is None
    assert settings("--operating-point", "2").operating_point == 2
    monkeypatch.setenv("SLICEWISE_OPERATING_POINT", "0")
    assert settings().operating_point == 0
    with pytest.raises(ValidationError, match="operating_point"):
        settings("--operating-point", "cheap")


@pytest.mark.parametrize("value", ["a,b", "a, b", " a ,b,"])
def test_lists_are_separated_by_commas_or_repeated(monkeypatch, value):
    monkeypatch.setenv("SLICEWISE_MODEL", value)
    assert settings().model == ["a", "b"]
    assert settings("--model", "x", "--model", "y,z").model == ["x", "y", "z"]


@pytest.mark.parametrize(
    "arguments", [("--port", "-1"), ("--model", ""), ("--queue-capacity-images", "8"), ("--profile-limit-s", "21")]
)
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ValidationError):
        settings(*arguments)


def test_a_password_in_an_address_is_not_shown():
    given = settings("--redis-url", "redis://user:hunter2@host")
    assert "hunter2" not in f"{given} {given!r} {given.model_dump(mode='json')}"
    assert "hunter2" in given.redis_url.get_secret_value()


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        settings().port = 1


def test_variables_that_nothing_reads_are_found(monkeypatch):
    monkeypatch.setenv("SLICEWISE_WORKRES", "2")
    monkeypatch.setenv("SLICEWISE_WORKERS", "2")
    assert unknown_variables() == ["SLICEWISE_WORKRES"]


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("150000 100000\n", 1.5), ("1000 100000\n", 0.01), ("max 100000\n", None), ("", None)],
)
def test_a_cpu_quota_is_seen(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert quota_cores(tmp_path / "cpu.max") == cores
    assert quota_cores(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("cores", "usable"), [("1", 1), ("0.01", 1), ("1.5", 2), ("64", 4)])
def test_a_quota_bounds_the_cores_and_is_rounded_up(monkeypatch, tmp_path, cores, usable):
    (tmp_path / "cpu.max").write_text(f"{float(cores) * 100_000:.0f} 100000")
    monkeypatch.setattr(settings_module, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(settings_module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert usable_cores() == usable
