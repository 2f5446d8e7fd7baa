"""Draws are repeated: each one's generator state is saved in the forward and swapped in around its copy.

`rand` reads no tensor, and `bernoulli` outside of the block is no concern of it.
"""


def before(
    x: "f32[4, 4] | input:0",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward: layers.0
    h: "f32[4, 4]" = aten.sin.default(x)
    drop: "(f32[4, 4], b8[4, 4])" = aten.native_dropout.default(h, 0.5, True)
    value: "f32[4, 4]" = drop[0]
    noise: "f32[4, 4]" = aten.rand.default([4, 4], device=DEVICE)
    r: "f32[4, 4]" = aten.mul.Tensor(value, noise)
    out: "f32[4, 4]" = aten.exp.default(r)
    # forward: head
    y: "f32[4, 4]" = aten.bernoulli.p(out, 0.5)
    # backward: layers.0
    dx: "f32[4, 4]" = aten.mul.Tensor(tangent, r)
    return {"output:0": y, "gradient:input:0": dx}


def after(
    x: "f32[4, 4] | input:0",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward: layers.0
    h: "f32[4, 4]" = aten.sin.default(x)
    rng: "u8[5056]" = geminifx.save_rng(h)
    drop: "(f32[4, 4], b8[4, 4])" = aten.native_dropout.default(h, 0.5, True)
    value: "f32[4, 4]" = drop[0]
    rng_1: "u8[5056]" = geminifx.save_rng(x)
    noise: "f32[4, 4]" = aten.rand.default([4, 4], device=DEVICE)
    r: "f32[4, 4]" = aten.mul.Tensor(value, noise)
    out: "f32[4, 4]" = aten.exp.default(r)
    # forward: head
    y: "f32[4, 4]" = aten.bernoulli.p(out, 0.5)
    # recompute: layers.0
    h_1: "f32[4, 4]" = aten.sin.default(x)
    geminifx.swap_rng(rng)
    drop_1: "(f32[4, 4], b8[4, 4])" = aten.native_dropout.default(h_1, 0.5, True)
    geminifx.swap_rng(rng)
    value_1: "f32[4, 4]" = drop_1[0]
    geminifx.swap_rng(rng_1)
    noise_1: "f32[4, 4]" = aten.rand.default([4, 4], device=DEVICE)
    geminifx.swap_rng(rng_1)
    r_1: "f32[4, 4]" = aten.mul.Tensor(value_1, noise_1)
    # backward: layers.0
    dx: "f32[4, 4]" = aten.mul.Tensor(tangent, r_1)
    return {"output:0": y, "gradient:input:0": dx}
