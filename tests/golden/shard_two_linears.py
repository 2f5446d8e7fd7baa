"""The first linear makes parts of the hidden dimension, the second their sum; so do the gradients, backwards."""


def before(
    x: "f32[8, 4] | input:0",
    w1: "f32[8, 4] | parameter:fc1.weight",
    w2: "f32[4, 8] | parameter:fc2.weight",
    tangent_0: "f32[8, 4] | tangent:0",
):
    # forward: fc1
    t: "f32[4, 8]{1, 4}" = aten.t.default(w1)
    y: "f32[8, 8]" = aten.mm.default(x, t)
    # forward: fc2
    t2: "f32[8, 4]{1, 8}" = aten.t.default(w2)
    z: "f32[8, 4]" = aten.mm.default(y, t2)
    # forward
    r: "f32[8, 4]" = aten.relu.default(z)
    # backward
    dz: "f32[8, 4]" = aten.threshold_backward.default(tangent_0, r, 0)
    # backward: fc2
    dz_t: "f32[4, 8]{1, 4}" = aten.t.default(dz)
    dw2: "f32[4, 8]" = aten.mm.default(dz_t, y)
    dy: "f32[8, 8]" = aten.mm.default(dz, w2)
    # backward: fc1
    dy_t: "f32[8, 8]{1, 8}" = aten.t.default(dy)
    dw1: "f32[8, 4]" = aten.mm.default(dy_t, x)
    dx: "f32[8, 4]" = aten.mm.default(dy, w1)
    return {"output:0": r, "gradient:fc1.weight": dw1, "gradient:fc2.weight": dw2, "gradient:input:0": dx}


def after(
    x: "f32[8, 4] | input:0",
    w1: "f32[4, 4] | parameter:fc1.weight | on tp=S0",
    w2: "f32[4, 4] | parameter:fc2.weight | on tp=S1",
    tangent_0: "f32[8, 4] | tangent:0",
):
    # forward: fc1
    t_1: "f32[4, 4]{1, 4} | on tp=S1" = aten.t.default(w1)
    mm: "f32[8, 4] | on tp=S1" = aten.mm.default(x, t_1)
    # forward: fc2
    t_2: "f32[4, 4]{1, 4} | on tp=S0" = aten.t.default(w2)
    mm_1: "f32[8, 4] | on tp=P" = aten.mm.default(mm, t_2)
    # forward
    all_reduce: "f32[8, 4] | on R" = geminifx.all_reduce(mm_1, 'tp', 'sum')
    relu: "f32[8, 4] | on R" = aten.relu.default(all_reduce)
    # backward
    threshold_backward: "f32[8, 4] | on R" = aten.threshold_backward.default(tangent_0, relu, 0)
    # backward: fc2
    t_3: "f32[4, 8]{1, 4} | on R" = aten.t.default(threshold_backward)
    mm_2: "f32[4, 4] | on tp=S1" = aten.mm.default(t_3, mm)
    mm_3: "f32[8, 4] | on tp=S1" = aten.mm.default(threshold_backward, w2)
    # backward: fc1
    t_4: "f32[4, 8]{1, 4} | on tp=S0" = aten.t.default(mm_3)
    mm_4: "f32[4, 4] | on tp=S0" = aten.mm.default(t_4, x)
    mm_5: "f32[8, 4] | on tp=P" = aten.mm.default(mm_3, w1)
    all_reduce_1: "f32[8, 4] | on R" = geminifx.all_reduce(mm_5, 'tp', 'sum')
    return {"output:0": relu, "gradient:fc1.weight": mm_4, "gradient:fc2.weight": mm_2, "gradient:input:0": all_reduce_1}
