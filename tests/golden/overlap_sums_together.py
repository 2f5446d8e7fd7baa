"""Sums that nothing reads yet wait for the next one alike and are taken as one; one that is read is not held back."""


def before(
    dy: "f32[8, 4] | input:0",
    g: "f32[8, 4] | input:1",
):
    # forward: layers.0.norm
    sum_1: "f32[4] | on tp=P" = aten.sum.dim_IntList(dy, [0])
    all_reduce: "f32[4] | on R" = geminifx.all_reduce(sum_1, 'tp', 'sum')
    amax: "f32[8, 1] | on tp=P" = aten.amax.default(dy, [-1], True)
    all_reduce_1: "f32[8, 1] | on R" = geminifx.all_reduce(amax, 'tp', 'max')
    sub: "f32[8, 4]" = aten.sub.Tensor(g, all_reduce_1)
    # forward: layers.0.fc
    sum_2: "f32[1, 4] | on tp=P" = aten.sum.dim_IntList(sub, [0], True)
    all_reduce_2: "f32[1, 4] | on R" = geminifx.all_reduce(sum_2, 'tp', 'sum')
    relu: "f32[8, 4]" = aten.relu.default(sub)
    return {"output:0": all_reduce, "output:1": all_reduce_2, "output:2": relu}


def after(
    dy: "f32[8, 4] | input:0",
    g: "f32[8, 4] | input:1",
):
    # forward: layers.0.norm
    sum_1: "f32[4] | on tp=P" = aten.sum.dim_IntList(dy, [0])
    amax: "f32[8, 1] | on tp=P" = aten.amax.default(dy, [-1], True)
    start_all_reduce: "f32[8, 1]" = geminifx.start_all_reduce(amax, 'tp', 'max')
    finish_collective: "f32[8, 1] | on R" = geminifx.finish_collective(start_all_reduce)
    sub: "f32[8, 4]" = aten.sub.Tensor(g, finish_collective)
    # forward: layers.0.fc
    sum_2: "f32[1, 4] | on tp=P" = aten.sum.dim_IntList(sub, [0], True)
    # forward: layers.0.norm
    view: "f32[4]" = aten.view.default(sum_2, [4])
    cat: "f32[8]" = aten.cat.default([sum_1, view])
    start_all_reduce_1: "f32[8]" = geminifx.start_all_reduce(cat, 'tp', 'sum')
    # forward: layers.0.fc
    relu: "f32[8, 4]" = aten.relu.default(sub)
    # forward: layers.0.norm
    finish_collective_1: "f32[8]" = geminifx.finish_collective(start_all_reduce_1)
    slice_1: "f32[4] | on R" = aten.slice.Tensor(finish_collective_1, 0, 0, 4)
    slice_2: "f32[4]" = aten.slice.Tensor(finish_collective_1, 0, 4, 8)
    view_1: "f32[1, 4] | on R" = aten.view.default(slice_2, [1, 4])
    return {"output:0": slice_1, "output:1": view_1, "output:2": relu}
