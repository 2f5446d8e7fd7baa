"""The generator is led through the first microbatch's draws; each microbatch goes on from where its own begin."""


def before(
    batch: "f32[4, 4] | input:0",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward
    x: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    # forward: layers.0
    dropped: "(f32[2, 4], b8[2, 4])" = aten.native_dropout.default(x, 0.5, True)
    h: "f32[2, 4]" = dropped[0]
    mask: "b8[2, 4]" = dropped[1]
    # forward: layers.1
    noise: "f32[2, 4]" = aten.bernoulli.p(h, 0.5)
    y: "f32[2, 4]" = aten.mul.Tensor(h, noise)
    # backward
    t: "f32[2, 4]" = geminifx.microbatch(tangent, 0, 2)
    # backward: layers.1
    dh: "f32[2, 4]" = aten.mul.Tensor(t, noise)
    # backward: layers.0
    dx: "f32[2, 4]" = aten.native_dropout_backward.default(dh, mask, 2.0)
    return {"output:0": y, "gradient:input:0": dx}


def after(
    batch: "f32[4, 4] | input:0",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward
    save_rng: "u8[5056]" = geminifx.save_rng(batch)
    # forward: layers.0
    empty_strided: "f32[2, 4]" = aten.empty_strided.default([2, 4], [4, 1], dtype=torch.float32, device=DEVICE)
    zeros_like: "f32[2, 4]" = aten.zeros_like.default(empty_strided)
    dropped_1: "(f32[2, 4], b8[2, 4])" = aten.native_dropout.default(zeros_like, 0.5, True)
    getitem: "f32[2, 4]" = dropped_1[0]
    geminifx.drawn(save_rng, getitem)
    # forward: layers.1
    empty_strided_1: "f32[2, 4]" = aten.empty_strided.default([2, 4], [4, 1], dtype=torch.float32, device=DEVICE)
    zeros_like_1: "f32[2, 4]" = aten.zeros_like.default(empty_strided_1)
    noise_1: "f32[2, 4]" = aten.bernoulli.p(zeros_like_1, 0.5)
    geminifx.drawn(save_rng, noise_1)
    # forward
    x: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    x_1: "f32[2, 4]" = geminifx.microbatch(batch, 1, 2)
    # forward: layers.0
    geminifx.swap_rng(save_rng)
    dropped: "(f32[2, 4], b8[2, 4])" = aten.native_dropout.default(x, 0.5, True)
    h: "f32[2, 4]" = dropped[0]
    mask: "b8[2, 4]" = dropped[1]
    geminifx.swap_rng(save_rng)
    dropped_2: "(f32[2, 4], b8[2, 4])" = aten.native_dropout.default(x_1, 0.5, True)
    h_1: "f32[2, 4]" = dropped_2[0]
    mask_1: "b8[2, 4]" = dropped_2[1]
    # forward: layers.1
    geminifx.swap_rng(save_rng)
    noise: "f32[2, 4]" = aten.bernoulli.p(h, 0.5)
    y: "f32[2, 4]" = aten.mul.Tensor(h, noise)
    geminifx.swap_rng(save_rng)
    noise_2: "f32[2, 4]" = aten.bernoulli.p(h_1, 0.5)
    y_1: "f32[2, 4]" = aten.mul.Tensor(h_1, noise_2)
    cat: "f32[4, 4]" = aten.cat.default([y, y_1])
    # backward
    t: "f32[2, 4]" = geminifx.microbatch(tangent, 0, 2)
    t_1: "f32[2, 4]" = geminifx.microbatch(tangent, 1, 2)
    # backward: layers.1
    dh: "f32[2, 4]" = aten.mul.Tensor(t, noise)
    dh_1: "f32[2, 4]" = aten.mul.Tensor(t_1, noise_2)
    # backward: layers.0
    dx: "f32[2, 4]" = aten.native_dropout_backward.default(dh, mask, 2.0)
    dx_1: "f32[2, 4]" = aten.native_dropout_backward.default(dh_1, mask_1, 2.0)
    cat_1: "f32[4, 4]" = aten.cat.default([dx, dx_1])
    return {"output:0": cat, "gradient:input:0": cat_1}
