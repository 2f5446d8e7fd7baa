"""Of a square of ranks each has a block of all three: the activation is gathered along its row, the weight along its column."""


def before(
    x: "f32[8, 4] | input:0",
    w: "f32[8, 4] | parameter:fc.weight",
    b: "f32[8] | parameter:fc.bias",
    tangent_0: "f32[8, 8] | tangent:0",
):
    # forward: fc
    t: "f32[4, 8]{1, 4}" = aten.t.default(w)
    y: "f32[8, 8]" = aten.addmm.default(b, x, t)
    # forward
    r: "f32[8, 8]" = aten.relu.default(y)
    # backward
    dr: "f32[8, 8]" = aten.threshold_backward.default(tangent_0, r, 0)
    # backward: fc
    dr_t: "f32[8, 8]{1, 8}" = aten.t.default(dr)
    dw: "f32[8, 4]" = aten.mm.default(dr_t, x)
    total: "f32[1, 8]" = aten.sum.dim_IntList(dr, [0], True)
    db: "f32[8]" = aten.view.default(total, [8])
    return {"output:0": r, "gradient:fc.weight": dw, "gradient:fc.bias": db}


def after(
    x: "f32[8, 4] | input:0",
    w: "f32[4, 2] | parameter:fc.weight | on row=S1 col=S0",
    b: "f32[4] | parameter:fc.bias | on col=S0",
    tangent_0: "f32[8, 8] | tangent:0",
):
    # forward: fc
    local: "f32[4, 4] | on row=S0" = geminifx.local(x, 0, 'row', 2)
    all_gather: "f32[4, 4] | on col=S0" = geminifx.all_gather(w, 1, 'row', 2)
    t_1: "f32[4, 4]{1, 4} | on col=S1" = aten.t.default(all_gather)
    addmm: "f32[4, 4] | on row=S0 col=S1" = aten.addmm.default(b, local, t_1)
    # forward
    relu: "f32[4, 4] | on row=S0 col=S1" = aten.relu.default(addmm)
    all_gather_1: "f32[4, 8] | on row=S0" = geminifx.all_gather(relu, 1, 'col', 2)
    all_gather_2: "f32[8, 8] | on R" = geminifx.all_gather(all_gather_1, 0, 'row', 2)
    # backward
    local_1: "f32[4, 8] | on row=S0" = geminifx.local(tangent_0, 0, 'row', 2)
    local_2: "f32[4, 4] | on row=S0 col=S1" = geminifx.local(local_1, 1, 'col', 2)
    threshold_backward: "f32[4, 4] | on row=S0 col=S1" = aten.threshold_backward.default(local_2, relu, 0)
    # backward: fc
    t_2: "f32[4, 4]{1, 4} | on row=S1 col=S0" = aten.t.default(threshold_backward)
    mm: "f32[4, 4] | on row=P col=S0" = aten.mm.default(t_2, local)
    reduce_scatter: "f32[4, 2] | on row=S1 col=S0" = geminifx.reduce_scatter(mm, 1, 'row', 2)
    sum_1: "f32[1, 4] | on row=P col=S1" = aten.sum.dim_IntList(threshold_backward, [0], True)
    view: "f32[4] | on row=P col=S0" = aten.view.default(sum_1, [4])
    all_reduce: "f32[4] | on col=S0" = geminifx.all_reduce(view, 'row', 'sum')
    return {"output:0": all_gather_2, "gradient:fc.weight": reduce_scatter, "gradient:fc.bias": all_reduce}
