import pytest, torch
from graftlm.methods import build
from graftlm.methods.uir import UIR
from graftlm.methods.lwf import LwF
from graftlm.methods.moincl import moincl
from distilled import same

@pytest.mark.parametrize("name", ["l2p", "modalprompt", "moelora", "pathweave", "olora"])
def test_mix(name, halves, learned):
    stages = [halves["image-caption"], halves["video-qa"], halves["image-qa"], halves["video-caption"]]
    def mix(): return [*build([name]), UIR(), LwF(), *moincl(weight=1.0)]
    a, seen = learned(stages, *mix(), epochs=1)
    print(name, [[log.first_loss for log in c.logs] for c in seen])
    b, _ = learned(stages, *mix(), epochs=1)
    assert same(a, b)

@pytest.mark.parametrize("name", ["l2p", "modalprompt"])
def test_zero(name, halves, beginning):
    m = build([name])[0]
    stages = [halves["image-caption"], halves["image-qa"]]
    for d in [UIR(), UIR(variant="fkl"), LwF()]:
        ctx = beginning(stages, m); d.prepare(ctx)
        b = ctx.model.batch(ctx.stage.samples()[:4])
        print(name, d, d.loss(ctx, b, ctx.forward(b)))
