"""Small networks as a Policy: what is drawn is what the forward scores; padding, temperature, disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlx.models.load import read
from rlx.models.nets import GridNet, NetPolicy, grid_net, mlp
from rlx.types import ConfigError, Episode, Sampling, Task, Turn

NONE = np.zeros(0, np.int64)


def episode(policy: NetPolicy, length: int, temperature: float = 1.0, group: int = 0) -> Episode:
    """An episode of `length` steps whose actions the policy drew."""
    rng = np.random.default_rng(length)
    seen = rng.standard_normal((length, 3)).astype(np.float32)
    did, logp = policy.sample(seen, rng.random(length), Sampling(1, temperature))
    token = {"seen": seen, "reward": np.ones(length, np.float32)}
    return Episode(Task(()), group, [Turn(NONE, did, logp, token=token)], reward=float(length))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_the_forward_scores_what_was_drawn_as_it_was_drawn(temperature: float) -> None:
    policy = mlp(inputs=3, actions=4, sizes=[8], seed=1)
    batch = policy.collate([episode(policy, 5, temperature), episode(policy, 2, temperature, group=1)])
    out = policy.forward(batch, {"logp"}, temperature)
    torch.testing.assert_close(out["logp"], batch["rollout_logp"], atol=1e-6, rtol=0)


def test_values_are_those_of_what_was_seen_and_padding_is_zero() -> None:
    policy = mlp(inputs=3, actions=4, sizes=[8], seed=1)
    episodes = [episode(policy, 5), episode(policy, 2, group=1)]
    batch = policy.collate(episodes)
    out = policy.forward(batch, policy.offers)
    assert batch["mask"].tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    for name in policy.offers:
        assert out[name].shape == (2, 5)
        assert out[name][1, 2:].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(out["value"][1, :2].detach(), policy.value(episodes[1].turns[0].token["seen"]), atol=1e-6)
    alone = policy.forward(batch.take([1]), {"value"})
    torch.testing.assert_close(alone["value"], out["value"][1:])


def test_draws_are_by_inverse_cdf_and_the_likeliest_at_temperature_0() -> None:
    policy = mlp(inputs=1, actions=3, sizes=[2])
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
        policy.module.actor[-1].bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    seen = np.zeros((4, 1), np.float32)
    did, logp = policy.sample(seen, np.array([0.0, 0.19, 0.21, 0.99]), Sampling(1))
    assert did.tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(np.exp(logp), [0.2, 0.2, 0.5, 0.3], atol=1e-6)
    greedy, logp = policy.sample(seen, np.array([0.0, 0.19, 0.21, 0.99]), Sampling(1, temperature=0.0))
    assert greedy.tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(np.exp(logp), 0.5, atol=1e-6)


def test_entropy_of_equal_chances_is_the_log_of_their_number() -> None:
    policy = mlp(inputs=3, actions=4, sizes=[8])
    with torch.no_grad():
        policy.module.actor[-1].weight.zero_()
    out = policy.forward(policy.collate([episode(policy, 3)]), {"entropy"})
    torch.testing.assert_close(out["entropy"], torch.full((1, 3), 4.0).log())


def test_a_view_is_read_row_by_row_and_the_rest_joins_after_the_convolutions() -> None:
    net = GridNet(side=5, extra=2, actions=3, channels=4, hidden=8)
    seen = torch.zeros(2, 77)
    seen[1, -1] = 1.0
    logits, value = net(seen)
    assert logits.shape == (2, 3)
    assert value[0] != value[1]
    found: list[torch.Tensor] = []
    net.view[0].register_forward_hook(lambda _, given, __: found.append(given[0]))
    net(torch.arange(77.0)[None])
    assert found[0][0, :, 0, 1].tolist() == [3.0, 4.0, 5.0]  # type, colour, state of the second cell of the first row


def test_saved_weights_are_read_back_with_their_sizes(tmp_path: Path) -> None:
    policy = grid_net(side=5, extra=3, actions=6, channels=4, hidden=8, seed=3)
    policy.save(tmp_path / "out")
    again = read(str(tmp_path / "out"), {}, 0)
    seen = np.random.default_rng(0).random((2, 78)).astype(np.float32)
    assert again.value(seen).tolist() == policy.value(seen).tolist()
    assert again.settings == policy.settings
    with pytest.raises(ConfigError, match="takes no heads"):
        read(str(tmp_path / "out"), {}, 0, heads={"value": "token"})


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (mlp(inputs=3, actions=2, seed=s).parameters()[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ConfigError, match=r"model\.actions: expected at least 1, got 0"):
        mlp(inputs=3, actions=0)
