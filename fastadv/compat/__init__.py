"""The calls of torchattacks, foolbox and AutoAttack, answered by this package: change the import, keep the code.

::

    from fastadv.compat import PGD, PGDL2  # torchattacks: PGD(model, eps=8/255, alpha=2/255, steps=10)(images, labels)
    from fastadv.compat import LinfPGD, L2PGD  # foolbox: LinfPGD(steps=40)(PyTorchModel(...), x, y, epsilons=8/255)
    from fastadv.compat import AutoAttack  # AutoAttack(model, norm="Linf", eps=8/255).run_standard_evaluation(x, y)

Without a random start the images are those of the originals, to rounding. Different on purpose, everywhere: the ball is
exact (theirs is left by 3e-8); every module's mode, every buffer and gradient is as before afterwards (torchattacks
puts the whole tree into one mode, foolbox fills p.grad and attacks in train mode); broken gradients and images outside
of the bounds raise instead of counting as robust.

The attacks themselves are :mod:`fastadv.pgd` and :mod:`fastadv.attacks`; whoever writes new code calls those.
"""

from fastadv.compat.autoattack import AutoAttack
from fastadv.compat.foolbox import L2PGD, LinfPGD
from fastadv.compat.torchattacks import PGD, PGDL2

__all__ = ["L2PGD", "PGD", "PGDL2", "AutoAttack", "LinfPGD"]
