"""The loss of an answer: the original's numbers, its gradient, and how little of the vocabulary stands at a time."""

import pytest
import torch
import torch.nn.functional as F

from sidestep.acestep.lm import loss as module
from sidestep.acestep.lm.loss import answer_loss
from sidestep.acestep.lm.prompts import END_OF_TURN, code_text


def trunk(tiny_lm, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tiny_lm.model.model(input_ids=ids[None]).last_hidden_state[0].clone()


@pytest.mark.parametrize("piece", [7, 512])
def test_losses_are_those_of_the_original(piece, lm_golden, lm_numbers, tiny_lm):
    head = tiny_lm.model.lm_head.weight
    for i, case in enumerate(lm_golden["plan"]):
        whole = case["prompt_codes"] + code_text(case["codes"]) + END_OF_TURN
        ids = torch.tensor(tiny_lm.tokens.ids(whole))
        assert len(ids) == case["n_all"]
        states = trunk(tiny_lm, ids)
        for name, n_prompt in (("loss", case["n_prompt"]), ("loss_codes_only", case["n_prompt_and_plan"])):
            found = answer_loss(states, head, ids, n_prompt, piece)
            torch.testing.assert_close(found, lm_numbers[f"plan.{i}.{name}"][0], atol=1e-5, rtol=1e-5)
        nll = lm_numbers[f"plan.{i}.token_nll"]
        torch.testing.assert_close(answer_loss(states, head, ids, 1, piece), nll.mean(), atol=1e-5, rtol=1e-5)
        reversed_codes = case["prompt_codes"] + code_text(case["codes"][::-1]) + END_OF_TURN
        ids = torch.tensor(tiny_lm.tokens.ids(reversed_codes))
        found = answer_loss(trunk(tiny_lm, ids), head, ids, case["n_prompt"], piece)
        torch.testing.assert_close(found, lm_numbers[f"plan.{i}.loss_reversed_codes"][0], atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(41, 8, generator=generator, dtype=torch.float64)
    head = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(50, (41,), generator=generator)
    largest = []
    linear = F.linear
    monkeypatch.setattr(module.F, "linear", lambda x, w: largest.append(len(x)) or linear(x, w))
    own = states.clone().requires_grad_()
    (3 * answer_loss(own, head, ids, 11, piece=8)).backward()
    assert max(largest) == 8
    assert sum(largest) == 30
    whole = states.clone().requires_grad_()
    (3 * F.cross_entropy(linear(whole, head)[10:-1].float(), ids[11:])).backward()
    torch.testing.assert_close(own.grad, whole.grad, atol=1e-7, rtol=1e-5)
    assert not own.grad[:10].any()
