"""What deploy/ says is so: every flag exists, every path and port is the one that the others mean. Nothing is built."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

pytest.importorskip("fastapi")

from foredraft.cli.app import app
from foredraft.cli.serve import ServeOptions
from foredraft.server.middleware import OPEN
from foredraft.server.settings import Limits

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def flags_of_serve() -> set[str]:
    group: Any = typer.main.get_command(app)
    return {name for parameter in group.commands["serve"].params for name in parameter.opts}


def command_of(file: str) -> list[str]:
    """What an image or the unit runs."""
    text = (DEPLOY / file).read_text()
    if file.endswith(".service"):
        return shlex.split(re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)[0])
    return json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cuda", "foredraft.service"])
def test_what_is_run_is_a_command_with_its_flags(file: str) -> None:
    program, command, *arguments = command_of(file)
    assert (Path(program).name, command) == ("foredraft", "serve")
    if file == "Dockerfile":
        arguments += COMPOSE["services"]["foredraft"]["command"]
    assert {word for word in arguments if word.startswith("--")} <= flags_of_serve()


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cuda"])
def test_images_show_and_probe_the_port_that_is_served(file: str) -> None:
    text = (DEPLOY / file).read_text()
    port = ServeOptions().port
    assert f"EXPOSE {port}\n" in text
    asked = re.findall(rf"http://127.0.0.1:{port}(/\w+)", text)
    assert asked and set(asked) <= set(OPEN)  # without a key
    assert "USER foredraft\n" in text and "useradd --create-home foredraft" in text


def test_no_image_holds_keys() -> None:
    secrets = [DEPLOY / secret["file"] for secret in COMPOSE["secrets"].values()]
    assert len(secrets) == 2
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(str(path.relative_to(ROOT)) in ignored for path in secrets)
    assert "deploy" in (ROOT / ".dockerignore").read_text().splitlines()


def test_compose_mounts_what_there_is_and_its_secrets_are_declared() -> None:
    assert (DEPLOY / COMPOSE["services"]["foredraft"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSE["services"]["foredraft"]["build"]["dockerfile"]).is_file()
    for service in COMPOSE["services"].values():
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert all((DEPLOY / volume.split(":")[0]).exists() for volume in service.get("volumes", ()))


def test_prometheus_asks_the_server_and_grafana_prometheus() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    server = COMPOSE["services"][host]
    assert int(port) == ServeOptions().port and f"127.0.0.1:{port}:{port}" in server["ports"]
    assert host in server["command"]  # among the names it answers to
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets") and secret.name in COMPOSE["services"]["prometheus"]["secrets"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]
    board = (DEPLOY / "grafana/foredraft.json").read_text()
    assert set(re.findall(r'"uid": "prometheus"', board))
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/foredraft.yaml").read_text())["providers"]
    assert any(
        volume.split(":")[1] == provider["options"]["path"] for volume in COMPOSE["services"]["grafana"]["volumes"]
    )


def test_systemd_waits_for_a_graceful_end() -> None:
    text = (DEPLOY / "foredraft.service").read_text()
    assert int(re.findall(r"TimeoutStopSec=(\d+)", text)[0]) > Limits().shutdown_timeout + 10
