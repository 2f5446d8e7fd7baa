"""Parts of the hidden dimension are dropped by numbers that ranks have apart, their sum by the same on all."""


def before(
    x: "f32[8, 4] | input:0",
    w1: "f32[8, 4] | parameter:fc1.weight",
    w2: "f32[4, 8] | parameter:fc2.weight",
    tangent_0: "f32[8, 4] | tangent:0",
):
    # forward: fc1
    t: "f32[4, 8]{1, 4}" = aten.t.default(w1)
    y: "f32[8, 8]" = aten.mm.default(x, t)
    # forward
    drop: "(f32[8, 8], b8[8, 8])" = aten.native_dropout.default(y, 0.5, True)
    y_1: "f32[8, 8]" = drop[0]
    kept: "b8[8, 8]" = drop[1]
    # forward: fc2
    t2: "f32[8, 4]{1, 8}" = aten.t.default(w2)
    z: "f32[8, 4]" = aten.mm.default(y_1, t2)
    # forward
    drop_1: "(f32[8, 4], b8[8, 4])" = aten.native_dropout.default(z, 0.5, True)
    z_1: "f32[8, 4]" = drop_1[0]
    kept_1: "b8[8, 4]" = drop_1[1]
    # backward
    dz: "f32[8, 4]" = aten.native_dropout_backward.default(tangent_0, kept_1, 2.0)
    # backward: fc2
    dz_t: "f32[4, 8]{1, 4}" = aten.t.default(dz)
    dw2: "f32[4, 8]" = aten.mm.default(dz_t, y_1)
    dy: "f32[8, 8]" = aten.mm.default(dz, w2)
    # backward
    dy_1: "f32[8, 8]" = aten.native_dropout_backward.default(dy, kept, 2.0)
    # backward: fc1
    dy_t: "f32[8, 8]{1, 8}" = aten.t.default(dy_1)
    dw1: "f32[8, 4]" = aten.mm.default(dy_t, x)
    return {"output:0": z_1, "gradient:fc1.weight": dw1, "gradient:fc2.weight": dw2}


def after(
    x: "f32[8, 4] | input:0",
    w1: "f32[4, 4] | parameter:fc1.weight | on tp=S0",
    w2: "f32[4, 4] | parameter:fc2.weight | on tp=S1",
    tangent_0: "f32[8, 4] | tangent:0",
):
    # forward: fc1
    t_1: "f32[4, 4]{1, 4} | on tp=S1" = aten.t.default(w1)
    mm: "f32[8, 4] | on tp=S1" = aten.mm.default(x, t_1)
    # forward
    fork_rng: "u8[5056]" = geminifx.fork_rng(mm, ['tp'])
    geminifx.swap_rng(fork_rng)
    native_dropout: "(f32[8, 4], b8[8, 4])" = aten.native_dropout.default(mm, 0.5, True)
    geminifx.swap_rng(fork_rng)
    getitem: "f32[8, 4] | on tp=S1" = native_dropout[0]
    getitem_1: "b8[8, 4] | on tp=S1" = native_dropout[1]
    # forward: fc2
    t_2: "f32[4, 4]{1, 4} | on tp=S0" = aten.t.default(w2)
    mm_1: "f32[8, 4] | on tp=P" = aten.mm.default(getitem, t_2)
    # forward
    all_reduce: "f32[8, 4] | on R" = geminifx.all_reduce(mm_1, 'tp', 'sum')
    native_dropout_1: "(f32[8, 4], b8[8, 4])" = aten.native_dropout.default(all_reduce, 0.5, True)
    getitem_2: "f32[8, 4] | on R" = native_dropout_1[0]
    getitem_3: "b8[8, 4] | on R" = native_dropout_1[1]
    # backward
    native_dropout_backward: "f32[8, 4] | on R" = aten.native_dropout_backward.default(tangent_0, getitem_3, 2.0)
    # backward: fc2
    t_3: "f32[4, 8]{1, 4} | on R" = aten.t.default(native_dropout_backward)
    mm_2: "f32[4, 4] | on tp=S1" = aten.mm.default(t_3, getitem)
    mm_3: "f32[8, 4] | on tp=S1" = aten.mm.default(native_dropout_backward, w2)
    # backward
    native_dropout_backward_1: "f32[8, 4] | on tp=S1" = aten.native_dropout_backward.default(mm_3, getitem_1, 2.0)
    # backward: fc1
    t_4: "f32[4, 8]{1, 4} | on tp=S0" = aten.t.default(native_dropout_backward_1)
    mm_4: "f32[4, 4] | on tp=S0" = aten.mm.default(t_4, x)
    return {"output:0": getitem_2, "gradient:fc1.weight": mm_4, "gradient:fc2.weight": mm_2}
