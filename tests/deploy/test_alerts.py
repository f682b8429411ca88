"""What alerts and the autoscaler's metric say of a server in trouble, by Prometheus's own evaluation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from prism_trt.resources import resource
from tests.deploy.test_operations import autoscaler_query, manifest

ALERTS = resource("deploy") / "monitoring" / "alerts.yaml"
SCRAPE_SECONDS = 10
MINUTES = 30
STEPS = MINUTES * 60 // SCRAPE_SECONDS
CANARY = f"0+1x{STEPS}"
"""A request each scrape, as the canary makes it."""
LABELS = 'instance="a",namespace="n",pod="a"'


def steady(value: float) -> str:
    return f"{value}x{STEPS}"


IDLE = {
    'up{job="prism"}': steady(1),
    "nv_inference_request_success": CANARY,
    'nv_inference_request_failure{reason="BACKEND"}': steady(0),
    'prism_requests{state="running"}': steady(0),
    'prism_requests{state="waiting"}': steady(0),
    'prism_failed_requests_total{cause="overload"}': steady(0),
}
BUSY = IDLE | {
    'prism_requests{state="running"}': steady(4),
    "prism_queue_seconds_count": f"0+10x{STEPS}",
    'prism_queue_seconds_bucket{le="0.01"}': f"0+10x{STEPS}",
    'prism_queue_seconds_bucket{le="+Inf"}': f"0+10x{STEPS}",
    "prism_first_token_seconds_count": f"0+10x{STEPS}",
    "prism_inter_token_seconds_count": f"0+100x{STEPS}",
}
STUCK_AT_FIRST = IDLE | {'prism_requests{state="running"}': steady(1)}
"""Without the histograms: they have no value yet."""
STUCK = BUSY | {
    "prism_queue_seconds_count": steady(50),
    'prism_queue_seconds_bucket{le="0.01"}': steady(50),
    'prism_queue_seconds_bucket{le="+Inf"}': steady(50),
    "prism_first_token_seconds_count": steady(50),
    "prism_inter_token_seconds_count": steady(500),
}
STUCK_BEHIND_A_FULL_QUEUE = STUCK | {
    'prism_requests{state="running"}': steady(0),
    'prism_requests{state="waiting"}': steady(0),
    'prism_failed_requests_total{cause="overload"}': f"0+2x{STEPS}",
}
"""The occupancy was last reported before the request that the engine hangs on."""
LONG_ANSWERS = STUCK | {
    'prism_requests{state="waiting"}': steady(3),
    "prism_inter_token_seconds_count": f"0+100x{STEPS}",
}
DEAD = IDLE | {
    "nv_inference_request_success": steady(70),
    'nv_inference_request_failure{reason="BACKEND"}': CANARY,
}
STOPPED = IDLE | {"nv_inference_request_success": steady(70)}
QUEUE = BUSY | {'prism_requests{state="waiting"}': steady(2)}
"""Two wait and one starts each second."""


def evaluate(series: dict[str, str], query: str, expected: list[tuple[str, float]], directory: Path) -> None:
    """Have promtool load the alerts, and compare the samples of `query` at the end of `series`."""
    promtool = shutil.which("promtool")
    assert promtool, "this test needs promtool: install your system's prometheus package"
    inputs = []
    for name, values in series.items():
        metric, _, labels = name.rstrip("}").partition("{")
        inputs.append({"series": f"{metric}{{{labels + ',' if labels else ''}{LABELS}}}", "values": values})
    samples = [{"labels": labels, "value": value} for labels, value in expected]
    test = {
        "interval": f"{SCRAPE_SECONDS}s",
        "input_series": inputs,
        "promql_expr_test": [{"expr": query, "eval_time": f"{MINUTES}m", "exp_samples": samples}],
    }
    rules = directory / "alerts.yaml"
    shutil.copy(ALERTS, rules)
    path = directory / "test.yaml"
    path.write_text(json.dumps({"rule_files": [rules.name], "evaluation_interval": "30s", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("series", "firing"),
    [
        pytest.param(IDLE, [], id="idle"),
        pytest.param(BUSY, [], id="busy"),
        pytest.param(QUEUE, [], id="queue"),
        pytest.param(STUCK_AT_FIRST, ["PrismNoTokens"], id="stuck at first"),
        pytest.param(STUCK, ["PrismNoTokens"], id="stuck"),
        pytest.param(
            STUCK_BEHIND_A_FULL_QUEUE, ["PrismNoTokens", "PrismRequestsRefused"], id="stuck behind a full queue"
        ),
        pytest.param(LONG_ANSWERS, ["PrismQueueLong"], id="long answers"),
        pytest.param(DEAD, ["PrismModelSilent"], id="dead"),
        pytest.param(STOPPED, ["PrismModelSilent"], id="stopped"),
    ],
)
def test_alerts_fire_where_they_should(series: dict[str, str], firing: list[str], tmp_path: Path) -> None:
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    evaluate(series, query, [(f'{{alertname="{alert}"}}', 1) for alert in firing], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("series", "seconds"),
    [
        pytest.param(IDLE, 0, id="never used"),
        pytest.param(BUSY, 0, id="busy"),
        pytest.param(QUEUE, 2, id="queue"),
        pytest.param(LONG_ANSWERS, 60, id="nothing starts"),
        pytest.param(LONG_ANSWERS | {'prism_requests{state="waiting"}': steady(0)}, 0, id="nobody waits"),
    ],
)
def test_the_autoscaler_sees_the_wait_also_when_nothing_starts(
    series: dict[str, str], seconds: float, tmp_path: Path
) -> None:
    query = autoscaler_query("namespace,pod", 'namespace="n",pod=~"a|b"')
    evaluate(series, query, [('{namespace="n", pod="a"}', seconds)], tmp_path)


def test_a_silence_that_alerts_holds_several_canaries() -> None:
    (rule,) = (
        rule
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == "PrismModelSilent"
    )
    silence = re.search(r"\[(\d+)m\]", rule["expr"])
    assert silence
    compose = yaml.safe_load((resource("deploy") / "compose.yaml").read_text())
    in_compose = int(compose["services"]["triton-a"]["healthcheck"]["interval"].removesuffix("s"))
    in_pods = manifest("deployment")["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["periodSeconds"]
    assert 60 * int(silence[1]) >= 6 * max(in_compose, in_pods)
