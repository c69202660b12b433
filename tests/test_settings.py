"""Settings are read, bounded, related to each other, and described in one and the same way in three files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import dask
import jsonschema
import pytest
import yaml

import dask_resilience.settings
from dask_resilience.errors import ConfigError, StoreError
from dask_resilience.settings import Settings, default_store, keys

PACKAGE = Path(dask_resilience.settings.__file__).parent
DEFAULTS = yaml.safe_load((PACKAGE / "resilience.yaml").read_text())["resilience"]
SCHEMA = yaml.safe_load((PACKAGE / "resilience-schema.yaml").read_text())

#: For each key another valid value and what it means.
CHANGED = {
    "store": ("/srv/journal", "/srv/journal"),
    "storage-options": ({"key": "a", "client_kwargs": {"b_c": 1}}, {"key": "a", "client_kwargs": {"b_c": 1}}),
    "cluster": ("prod", "prod"),
    "leader-poll": ("200ms", 0.2),
    "journal.commit-interval": ("30ms", 0.03),
    "journal.segment-size": ("1 MiB", 2**20),
    "journal.pending-limit": ("1 GiB", 2**30),
    "journal.on-failure": ("stop-scheduler", "stop-scheduler"),
    "snapshot.after": ("1 GiB", 2**30),
    "failover.lease-ttl": ("4.5s", 4.5),
    "failover.grace": ("1m", 60.0),
    "failover.client-grace": (30, 30.0),
    "failover.link-grace": ("1s", 1.0),
    "worker.patience": ("1h", 3600.0),
    "client.patience": ("2h", 7200.0),
}


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def schema_leaves(node, prefix=""):
    for name, child in node["properties"].items():
        if "properties" in child:
            yield from schema_leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def flat(settings):
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from flat(value)
        else:
            yield item.metadata["key"], value


def test_yaml_schema_and_dataclass_name_the_same_keys():
    described = dict(schema_leaves(SCHEMA["properties"]["resilience"]))
    assert set(keys()) == set(dict(leaves(DEFAULTS))) == set(described) == set(CHANGED)
    for key, entry in described.items():
        assert len(entry["description"]) > 40, key


def test_the_schema_accepts_the_defaults_and_refuses_unknown_keys():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate({"resilience": DEFAULTS})
    assert not validator.is_valid({"resilience": {**DEFAULTS, "stoer": "x"}})


@pytest.mark.parametrize("key", sorted(CHANGED))
def test_each_key_is_read_and_changes_nothing_else(key):
    raw, meaning = CHANGED[key]
    default = dict(flat(Settings.load()))
    with dask.config.set({f"resilience.{key}": raw}):
        changed = dict(flat(Settings.load()))
    assert changed == {**default, key: meaning}
    assert default[key] != meaning


@pytest.mark.parametrize("key", sorted(CHANGED))
def test_the_schema_accepts_what_load_accepts(key):
    tree = {"resilience": {}}
    dask.config.set({f"resilience.{key}": CHANGED[key][0]}, config=tree)
    jsonschema.Draft202012Validator(SCHEMA).validate(tree)


def test_each_setting_is_used_somewhere():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        if path != Path(dask_resilience.settings.__file__):
            used |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    named = {item.name for part in parts(Settings.load()) for item in fields(part)}
    assert named <= used, f"nothing reads {sorted(named - used)}"


def parts(settings):
    yield settings
    for item in fields(settings):
        if is_dataclass(getattr(settings, item.name)):
            yield from parts(getattr(settings, item.name))


def test_defaults():
    settings = Settings.load()
    assert settings.store is None
    assert settings.failover.lease_ttl_seconds == 3.0
    assert settings.journal.segment_size_bytes == 16 * 2**20


@pytest.mark.parametrize(
    ("store", "ttl", "interval"),
    [
        (None, 3.0, 0.02),
        ("/srv/journal", 3.0, 0.02),
        ("file:///srv/journal", 3.0, 0.02),
        ("memory://journal", 3.0, 0.02),
        ("s3://bucket/prod", 10.0, 0.1),
        ("s3a://bucket/prod", 10.0, 0.1),
        ("gs://bucket/prod", 10.0, 0.1),
        ("gcs://bucket/prod", 10.0, 0.1),
    ],
)
def test_what_is_unset_fits_the_store(store, ttl, interval):
    with dask.config.set({"resilience.store": store}):
        settings = Settings.load()
        assert (settings.failover.lease_ttl_seconds, settings.journal.commit_interval_seconds) == (ttl, interval)
        with dask.config.set({"resilience.failover.lease-ttl": "5s", "resilience.journal.commit-interval": 0}):
            settings = Settings.load()
        assert (settings.failover.lease_ttl_seconds, settings.journal.commit_interval_seconds) == (5.0, 0.0)


def test_what_is_unset_must_fit_the_rest_too():
    with (
        dask.config.set({"resilience.store": "s3://bucket/prod", "resilience.worker.patience": "5s"}),
        pytest.raises(ConfigError, match=r"lease-ttl: 10.00 s must be shorter than resilience.worker.patience"),
    ):
        Settings.load()


@pytest.mark.parametrize(
    ("key", "raw", "says"),
    [
        ("failover.gracee", "1s", "did you mean resilience.failover.grace?"),
        ("failover.lease_tll", "1s", "did you mean resilience.failover.lease-ttl?"),
        ("stoer", "/x", "did you mean resilience.store?"),
        ("grace", "1s", "did you mean resilience.failover.grace?"),
        ("failover.grace", {"long": "1s"}, "there is no such setting"),
        ("failover", "3s", "expected a mapping"),
        ("failover", None, "expected a mapping"),
        ("failover.lease-ttl", "soon", "a duration such as '3s'"),
        ("failover.lease-ttl", "3 parsecs", "a duration such as '3s'"),
        ("failover.lease-ttl", "", "a duration such as '3s'"),
        ("failover.lease-ttl", "-3s", "a duration such as '3s'"),
        ("failover.lease-ttl", True, "a duration such as '3s'"),
        ("failover.grace", None, "a duration such as '3s'"),
        ("failover.lease-ttl", float("nan"), "a duration such as '3s'"),
        ("failover.lease-ttl", float("inf"), "a duration such as '3s'"),
        ("failover.lease-ttl", "9e999s", "a duration such as '3s'"),
        ("failover.lease-ttl", ["3s"], "a duration such as '3s'"),
        ("failover.lease-ttl", "1ms", "out of bounds"),
        ("failover.lease-ttl", "2h", "out of bounds"),
        ("journal.segment-size", "big", "a size such as '64 MiB'"),
        ("journal.segment-size", "", "a size such as '64 MiB'"),
        ("journal.segment-size", float("inf"), "a size such as '64 MiB'"),
        ("journal.segment-size", "1kB", "out of bounds"),
        ("journal.segment-size", -1, "out of bounds"),
        ("journal.on-failure", "panic", "is not one of stop-acks, stop-scheduler"),
        ("journal.on-failure", ["stop-acks"], "is not one of"),
        ("store", 7, "expected text or null"),
        ("store", "  ", "expected text or null"),
        ("cluster", 1234, "put quotes around it"),
    ],
)
def test_what_is_wrong_is_named(key, raw, says):
    with dask.config.set({f"resilience.{key}": raw}), pytest.raises(ConfigError) as caught:
        Settings.load()
    assert says in str(caught.value)
    assert caught.value.key.startswith("resilience.")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"leader-poll": "3s"}, "resilience.leader-poll: 3.00 s must be shorter than resilience.failover.lease-ttl"),
        ({"leader-poll": "2s", "failover.grace": "1s"}, "shorter than resilience.failover.grace"),
        ({"leader-poll": "2s", "failover.client-grace": "1s"}, "shorter than resilience.failover.client-grace"),
        (
            {"failover.lease-ttl": "500ms", "leader-poll": "100ms", "journal.commit-interval": "500ms"},
            "commit-interval",
        ),
        ({"worker.patience": "2s"}, "shorter than resilience.worker.patience"),
        ({"client.patience": "3s"}, "shorter than resilience.client.patience"),
        ({"journal.pending-limit": "8 MiB"}, "must hold a whole segment"),
    ],
)
def test_settings_that_contradict_each_other(changes, says):
    tree = {f"resilience.{key}": raw for key, raw in changes.items()}
    with dask.config.set(tree), pytest.raises(ConfigError) as caught:
        Settings.load()
    assert says in str(caught.value)


def test_a_tree_that_is_no_mapping():
    with dask.config.set({"resilience": "on"}), pytest.raises(ConfigError, match="expected a mapping"):
        Settings.load()


def test_a_configuration_without_its_defaults():
    known = dict(flat(Settings.load()))
    with dask.config.set({"resilience": {"store": "/srv/journal"}}):
        assert dict(flat(Settings.load())) == {**known, "store": "/srv/journal"}


def test_defaults_outlive_the_block_in_which_they_were_first_read(tmp_path):
    code = (
        "import dask\n"
        "with dask.config.set({'resilience.store': '/srv/journal'}):\n"
        "    from dask_resilience.settings import Settings\n"
        "print(Settings.load().store, Settings.load().failover.grace_seconds)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["None", "10.0"], done.stderr


def test_environment_names_have_underscores(tmp_path):
    """In a process of its own, because the environment is read when Dask is imported."""
    code = (
        "from dask_resilience.settings import Settings; s = Settings.load();"
        "print(s.failover.lease_ttl_seconds, s.journal.on_failure, s.store, s.failover.grace_seconds)"
    )
    environment = {
        **os.environ,
        "DASK_RESILIENCE__FAILOVER__LEASE_TTL": "7s",
        "DASK_RESILIENCE__JOURNAL__ON_FAILURE": "stop-scheduler",
        "DASK_RESILIENCE__STORE": "/srv/journal",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7.0", "stop-scheduler", "/srv/journal", "10.0"], done.stderr


@pytest.fixture
def temporary(tmp_path):
    with dask.config.set({"temporary-directory": str(tmp_path)}):
        yield tmp_path


def test_a_fixed_port_finds_its_store_again(temporary):
    first = default_store(8786)
    assert first == str(temporary / f"dask-resilience-{os.getuid()}" / "scheduler-8786")
    assert default_store(8786) == first
    assert Path(first).stat().st_mode & 0o777 == 0o700
    assert Path(first).parent.stat().st_mode & 0o777 == 0o700


def test_any_free_port_gives_a_fresh_store(temporary):
    first, second = default_store(0), default_store(0)
    assert first != second
    assert Path(first).stat().st_mode & 0o777 == 0o700
    assert not list(Path(first).iterdir())


def test_the_system_temporary_directory_is_the_fallback(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with dask.config.set({"temporary-directory": None}):
        assert Path(default_store(8786)).parent.parent == tmp_path


def test_a_directory_that_others_can_enter_is_refused(temporary):
    store = Path(default_store(8786))
    store.chmod(0o755)
    with pytest.raises(StoreError, match="only this user"):
        default_store(8786)


def test_a_link_under_our_name_is_refused(temporary):
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (temporary / f"dask-resilience-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="only this user"):
        default_store(8786)


def test_a_file_in_the_way_is_refused(temporary):
    (temporary / f"dask-resilience-{os.getuid()}").write_text("")
    with pytest.raises(StoreError, match="cannot be created"):
        default_store(8786)
