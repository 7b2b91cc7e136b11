import torch

from retnet.measure.training_step import Learner
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig

MODEL = ModelConfig(17, 16, 1, RetentionConfig(num_heads=2))


def test_steps_lower_the_loss_of_what_they_learn():
    torch.manual_seed(0)
    learner = Learner(LanguageModel(MODEL))
    text = torch.randint(17, (2, 9))
    tokens, targets = text[:, :-1], text[:, 1:]

    def loss():
        with torch.no_grad():
            return float(
                torch.nn.functional.cross_entropy(learner.model(tokens).flatten(0, 1), targets.flatten())
            )

    before = loss()
    for _ in range(20):
        assert learner.seconds(tokens, targets) > 0
    assert loss() < 0.9 * before
    assert all(p.grad is None for p in learner.model.parameters())


def test_bf16_is_of_the_forward_pass_alone():
    seen = []
    model = LanguageModel(MODEL)
    first = Learner(model)

    def logits(tokens):
        out = model(tokens)
        seen.append(out.dtype)
        return out

    Learner(model, logits, optimizer=first.optimizer, bf16=True).step(*torch.randint(17, (2, 1, 8)))
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert first.optimizer.state  # shared
