"""Manifests, balancer and monitoring: valid by their schemas, and true to a running server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import crossplane
import httpx
import kubernetes_validate
import promql_parser
import pytest
import yaml

from prism_trt.config import TreeShape
from prism_trt.deploy.server import HOST, TritonFiles, TritonServer, free_port
from prism_trt.resources import resource
from tests.deploy.grpc import ask

FILES = resource("deploy")
FIRST_SOUND_TRITON = (25, 7)
"""docs/operations.md says why."""
FIRST_RESOLVING_NGINX = (1, 28)
"""The first stable branch in which an upstream's addresses may change."""
MODELS = "/models"
"""Where containers have the model repository."""
ELSEWHERE = "127.0.0.2"
"""Another address of this machine than `HOST`."""
OF_PROMETHEUS = {"up"}
"""Metrics that Prometheus adds itself."""
KINDS = {
    "namespace": "Namespace",
    "service": "Service",
    "deployment": "Deployment",
    "autoscaler": "HorizontalPodAutoscaler",
    "disruption": "PodDisruptionBudget",
    "network": "NetworkPolicy",
}


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FILES / "kubernetes" / f"{name}.yaml").read_text())
    return loaded


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes_manifests_fit_their_schemas(name: str) -> None:
    assert manifest(name)["kind"] == KINDS[name]
    for version in ("1.29", "1.33", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(manifest(name), version, strict=True)


def test_a_wrong_manifest_does_not_fit() -> None:
    wrong = manifest("deployment")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_kubernetes_manifests_belong_together() -> None:
    assert manifest("kustomization")["resources"] == [f"{name}.yaml" for name in KINDS]
    deployment = manifest("deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("disruption")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("network")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("autoscaler")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (rule,) = manifest("prometheus-adapter")["rules"]["custom"]
    assert manifest("autoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert {image["name"] for image in manifest("kustomization")["images"]} == {
        container["image"] for container in deployment["spec"]["template"]["spec"]["containers"]
    }


def test_pods_are_locked_down_and_have_time_to_end() -> None:
    pod = manifest("deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert container["livenessProbe"]
        assert container["readinessProbe"]
    triton, frontend = pod["containers"]
    assert triton["startupProbe"]
    assert {"--grpc-address=127.0.0.1", "--http-address=127.0.0.1"} <= set(triton["args"])
    waits = [int(container["lifecycle"]["preStop"]["exec"]["command"][1]) for container in pod["containers"]]
    ends = [
        int(argument.split("=")[1])
        for argument in (triton["args"] + frontend["args"])
        if re.search("exit|grace", argument)
    ]
    assert len(ends) == 2
    assert max(waits) + max(ends) + 10 <= pod["terminationGracePeriodSeconds"]


def test_compose_file_fits_the_compose_specification(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(FILES / "compose.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    compose = yaml.safe_load((FILES / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (FILES / volume.split(":")[0]).is_file()
    compose["services"]["frontend"]["restarts"] = "always"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(compose))
    assert subprocess.run([*check, str(tmp_path / "compose.yaml")], capture_output=True, check=False).returncode == 1


class ShippedServer(TritonServer):
    """A server with the arguments of one of the shipped files; `HOST` is the address the tests ask by default."""

    shipped: list[str] = []

    def _command(self, files: TritonFiles, runtime: Path) -> list[str]:
        own = [
            argument for argument in super()._command(files, runtime) if re.match(r"--(backend-|\w+-port=)", argument)
        ]
        # Compose isolates gRPC by its network alone, which is not there.
        here = [argument for argument in self.shipped if not argument.startswith("--grpc-address")]
        return [str(files.server), *here, f"--grpc-address={HOST}", *own]


def shipped_arguments(name: str, repository: Path) -> list[str]:
    """Of a Triton server, by the file `name`."""
    arguments: list[str] = (
        yaml.safe_load((FILES / "compose.yaml").read_text())["services"]["triton-a"]["command"]
        if name == "compose"
        else manifest("deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    assert f"--model-repository={MODELS}" in arguments
    return [
        re.sub(r"\$[({]ADMIN_KEY[^)}]*[)}]", "secret", argument).replace(MODELS, str(repository))
        for argument in arguments
    ]


@pytest.mark.parametrize("name", ["compose", "deployment"])
def test_prometheus_reaches_the_metrics_from_elsewhere_and_nobody_http(name: str, repository: Path) -> None:
    server = ShippedServer(repository)
    server.shipped = shipped_arguments(name, repository)
    with server:
        assert 'prism_requests{state="waiting"' in httpx.get(server.metrics_url.replace(HOST, ELSEWHERE)).text
        assert httpx.get(f"{server.http_url}/v2/models/prism/ready").status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.http_url.replace(HOST, ELSEWHERE))


def test_every_server_has_one_gpu_of_its_own() -> None:
    services = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]
    (one,), (other,) = (
        services[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("triton-a", "triton-b")
    )
    assert len(one["device_ids"]) == len(other["device_ids"]) == 1
    defaults = [re.fullmatch(r"\$\{\w+:-(\d+)\}", device["device_ids"][0]) for device in (one, other)]
    assert [found and found[1] for found in defaults] == ["0", "1"]
    triton = manifest("deployment")["spec"]["template"]["spec"]["containers"][0]
    for amounts in triton["resources"].values():
        assert amounts["nvidia.com/gpu"] == "1"


def test_no_file_allows_a_triton_with_known_flaws() -> None:
    named = {
        (path.name, (int(year), int(month)))
        for path in FILES.rglob("*")
        if path.is_file()
        for year, month in re.findall(r"\b(2\d)\.(\d\d)-py3", path.read_text())
    }
    assert {name for name, _ in named} == {"Dockerfile", "compose.yaml", "kustomization.yaml"}
    assert min(version for _, version in named) >= FIRST_SOUND_TRITON


def test_nginx_configuration_parses() -> None:
    parsed = crossplane.parse(str(FILES / "nginx.conf"), strict=True)
    assert (parsed["status"], parsed["errors"]) == ("ok", [])


def test_nginx_finds_servers_that_come_back_elsewhere() -> None:
    (http,) = (
        directive["block"]
        for directive in crossplane.parse(str(FILES / "nginx.conf"))["config"][0]["parsed"]
        if directive["directive"] == "http"
    )
    assert ["127.0.0.11", "valid=5s", "ipv6=off"] in [
        directive["args"] for directive in http if directive["directive"] == "resolver"
    ]
    (upstream,) = (directive["block"] for directive in http if directive["directive"] == "upstream")
    assert "zone" in [directive["directive"] for directive in upstream]
    servers = [directive["args"] for directive in upstream if directive["directive"] == "server"]
    compose = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]
    assert [arguments[0].partition(":")[0] for arguments in servers] == [name for name in compose if "triton" in name]
    assert all("resolve" in arguments for arguments in servers)
    tag = re.search(r"(\d+)\.(\d+)-alpine", compose["nginx"]["image"])
    assert tag
    assert (int(tag[1]), int(tag[2])) >= FIRST_RESOLVING_NGINX


def names_in(expression: str) -> set[str]:
    """Metrics that a PromQL expression reads."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        for child in ("lhs", "rhs", "expr", "vector_selector"):
            if hasattr(node, child):
                walk(getattr(node, child))
        for argument in getattr(node, "args", []):
            walk(argument)

    walk(promql_parser.parse(expression))
    return found


def autoscaler_query(labels: str, matchers: str) -> str:
    """What prometheus-adapter makes of its rule, for the pods that have `matchers`."""
    (rule,) = manifest("prometheus-adapter")["rules"]["custom"]
    query: str = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
    return query.replace("<<.GroupBy>>", labels).replace("<<.LabelMatchers>>", matchers)


def expressions() -> list[str]:
    """Every query of the dashboard, the alerts and the autoscaler's metric."""
    dashboard = json.loads((FILES / "monitoring" / "grafana" / "prism.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((FILES / "monitoring" / "alerts.yaml").read_text())
    found += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    found.append(autoscaler_query("pod", 'pod="a"'))
    return [expression.replace("$__rate_interval", "5m") for expression in found]


def test_queries_read_only_what_a_server_exports(server: TritonServer) -> None:
    inputs = {"text_input": "The quick", "max_tokens": 20}
    for _ in range(2):
        ask(server.grpc_url, inputs)
    page = httpx.get(server.metrics_url).text
    exported = set(re.findall(r"^(\w+)(?:{.*})? \S+$", page, re.MULTILINE))
    read = set().union(*map(names_in, expressions()))
    assert len(read) > 12
    assert read - OF_PROMETHEUS <= exported
    assert 'reason="CANCELED"' in page
    # Label values that queries name, or count on.
    for label in (
        'state="running"',
        'state="waiting"',
        'state="cached"',
        'step="0"',
        'cause="overload"',
        'cause="engine"',
    ):
        assert label in page
    trees = set(re.findall(r'prism_target_passes_total{.*tree="([^"]+)"', page))
    assert trees
    assert all(tree == "none" or TreeShape.parse(tree) for tree in trees)


def test_metrics_add_up(server: TritonServer) -> None:
    def read() -> dict[str, float]:
        values: dict[str, float] = {}
        for name, value in re.findall(
            r"^(prism_\w+)(?:{.*})? (\S+)$", httpx.get(server.metrics_url).text, re.MULTILINE
        ):
            values[name] = values.get(name, 0.0) + float(value)
        return values

    before = read()
    (answer,) = ask(server.grpc_url, {"text_input": "The lazy dog", "max_tokens": 30, "end_id": -1})
    after = {name: value - before.get(name, 0.0) for name, value in read().items()}
    assert after["prism_prompt_tokens_total"] == answer["num_input_tokens"]
    assert after["prism_prefix_hit_tokens_total"] == answer["num_reused_tokens"]
    assert after["prism_output_tokens_total"] == answer["num_output_tokens"] == 30
    assert after["prism_target_passes_total"] == answer["num_target_passes"]
    assert after["prism_accepted_draft_tokens_total"] == answer["total_accepted_draft_tokens"]
    assert after["prism_inter_token_seconds_count"] == answer["num_target_passes"]
    for name in ("prism_queue_seconds_count", "prism_first_token_seconds_count", "prism_finished_requests_total"):
        assert after[name] == 1
    assert after["prism_first_token_seconds_sum"] >= after["prism_queue_seconds_sum"] > 0
    assert after["prism_kv_slots"] == 0
    assert after["prism_failed_requests_total"] == 0


def canaries() -> list[str]:
    probe = manifest("deployment")["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    compose = yaml.safe_load((FILES / "compose.yaml").read_text())
    return [probe["exec"]["command"][2], compose["services"]["triton-a"]["healthcheck"]["test"][1]]


def test_the_canary_sees_a_model_that_answers_and_one_that_does_not(server: TritonServer) -> None:
    for command in canaries():
        for url, code in ((server.http_url, 0), (f"http://127.0.0.1:{free_port()}", 1)):
            here = command.replace("http://127.0.0.1:8000", url)
            assert here != command
            assert subprocess.run(["sh", "-c", here], check=False).returncode == code
