"""Plans made by hand, stage by stage, as an exporter would write them."""

from edgekit.plan import SCORES, Exit, Gate, Plan, Run, Stage
from edgekit.tensors import TensorSpec


class Planner:
    """Writes plans stage by stage, as an exporter would."""

    def __init__(self, name="x"):
        self.tensors, self.stages, self.steps = {}, [], []
        self.at = self.tensor(name)

    def tensor(self, name, shape=("batch", 16, 8, 8)):
        self.tensors[name] = TensorSpec(name, "float32", shape)
        return name

    def run(self, name, read, *, value=False, macs=1_000_000):
        """A stage that makes one tensor, and with ``value`` the one number of a gate as well."""
        outputs = [self.tensor(f"{name}/relu")] + ([self.tensor(f"{name}/gt", ("batch", 1))] if value else [])
        self.stages.append(
            Stage(
                name=name, module=f"net.{name}", inputs=(read,), outputs=tuple(outputs), macs=macs, weight_bytes=9_000,
                exit=False,
            )
        )  # fmt: skip
        return Run(name), *outputs

    def gate(self, name, value, steps, *, opened, closed, otherwise=()):
        output = self.tensor(f"{name}/add")
        made = Gate(name=name, value=value, steps=steps, otherwise=otherwise, outputs={output: (opened, closed)})
        return made, output

    def exit(self, name, read):
        scores = {score: f"{name}.{score}" for score in SCORES}
        logits = self.tensor(f"{name}.logits", ("batch", 10))
        temperature = self.tensor(f"{name}.temperature", ())
        for score in scores.values():
            self.tensor(score, ("batch",))
        outputs = (logits, *scores.values())
        self.stages.append(
            Stage(name=f"{name}.head", inputs=(read, temperature), outputs=outputs, macs=5_000, weight_bytes=100)
        )
        return Run(f"{name}.head"), Exit(name=name, logits=logits, temperature=temperature, scores=scores)

    def plan(self, *steps):
        first = next(iter(self.tensors.values()))
        return Plan(inputs=(first,), tensors=self.tensors, stages=tuple(self.stages), steps=steps)


def chained(gates):
    """As many skippable blocks one after the other, each asked by a stage of its own."""
    net, steps = Planner(), []
    for index in range(gates):
        ask, _, value = net.run(f"gate{index}", net.at, value=True)
        block, made = net.run(f"layer{index}", net.at)
        gate, net.at = net.gate(f"layer{index}", value, (block,), opened=made, closed=net.at)
        steps += [ask, gate]
    return net.plan(*steps, *net.exit("exit1", net.at))


def nested(name="x"):
    """Gates inside a gate, one with two ways, one that runs when closed, one that runs nothing, around an exit."""
    net = Planner(name)
    stem, before, outer = net.run("stem", net.at, value=True)
    ask, asked, inner = net.run("outer.ask", before, value=True)
    (one, a), (two, b) = net.run("outer.one", asked), net.run("outer.two", asked, macs=200_000)
    branch, joined = net.gate("outer.branch", inner, (one,), opened=a, closed=b, otherwise=(two,))
    middle, c, again = net.run("outer.middle", joined, value=True)
    deep, d = net.run("outer.deep", c)
    deepest, e = net.gate("outer.deep", again, (deep,), opened=d, closed="")
    whole, f = net.gate("outer", outer, (ask, branch, middle, deepest), opened=e, closed=before)
    head, early = net.exit("exit1", f)
    tail, g, last = net.run("tail", f, value=True)
    other, h = net.run("only_closed", g, macs=None)
    closed, i = net.gate("only_closed", last, (), opened=g, closed=h, otherwise=(other,))
    pick, j = net.gate("pick", last, (), opened=i, closed=g)
    return net.plan(stem, whole, head, early, tail, closed, pick, *net.exit("exit2", j))


def looped():
    """One stage run twice, the second time only where a gate is open."""
    net = Planner()
    step, once, value = net.run("step", net.at, value=True)
    names = {net.at: once, once: net.tensor("step_2/relu"), value: net.tensor("step_2/gt", ("batch", 1))}
    gate, out = net.gate("step_2", value, (Run("step", names),), opened=names[once], closed=once)
    return net.plan(step, gate, *net.exit("exit1", out))
