"""Each gather starts in front of the wait for the one before it, and none in front of the turn for behind it."""


def before(
    x: "f32[8, 4] | input:0",
    w1: "f32[2, 4] | parameter:fc1.weight | on tp=S0",
    w2: "f32[4, 2] | parameter:fc2.weight | on tp=S1",
):
    # forward: fc1
    all_gather: "f32[4, 4] | on R" = geminifx.all_gather(w1, 0, 'tp', 2)
    t: "f32[4, 4]{1, 4}" = aten.t.default(all_gather)
    y: "f32[8, 4]" = aten.mm.default(x, t)
    # forward: fc2
    all_gather_1: "f32[4, 4] | on R" = geminifx.all_gather(w2, 1, 'tp', 2)
    t_1: "f32[4, 4]{1, 4}" = aten.t.default(all_gather_1)
    z: "f32[8, 4]" = aten.mm.default(y, t_1)
    turn: "(f32[8, 4])" = yield [z], [0]
    # backward
    tangent: "f32[8, 4]" = turn[0]
    # backward: fc2
    all_gather_2: "f32[4, 4] | on R" = geminifx.all_gather(w2, 1, 'tp', 2)
    dy: "f32[8, 4]" = aten.mm.default(tangent, all_gather_2)
    # backward: fc1
    all_gather_3: "f32[4, 4] | on R" = geminifx.all_gather(w1, 0, 'tp', 2)
    dx: "f32[8, 4]" = aten.mm.default(dy, all_gather_3)
    return {"gradient:input:0": dx}


def after(
    x: "f32[8, 4] | input:0",
    w1: "f32[2, 4] | parameter:fc1.weight | on tp=S0",
    w2: "f32[4, 2] | parameter:fc2.weight | on tp=S1",
):
    # forward: fc1
    start_all_gather: "f32[4, 4]" = geminifx.start_all_gather(w1, 'tp', 2)
    # forward: fc2
    start_all_gather_1: "f32[8, 2]" = geminifx.start_all_gather(w2, 'tp', 2)
    # forward: fc1
    finish_collective: "f32[4, 4] | on R" = geminifx.finish_collective(start_all_gather, w1)
    t: "f32[4, 4]{1, 4}" = aten.t.default(finish_collective)
    y: "f32[8, 4]" = aten.mm.default(x, t)
    # forward: fc2
    finish_collective_1: "f32[8, 2]" = geminifx.finish_collective(start_all_gather_1, w2)
    view: "f32[2, 4, 2]" = aten.view.default(finish_collective_1, [2, 4, 2])
    permute: "f32[4, 2, 2]{2, 8, 1}" = aten.permute.default(view, [1, 0, 2])
    clone: "f32[4, 2, 2]" = aten.clone.default(permute, memory_format=torch.contiguous_format)
    view_1: "f32[4, 4] | on R" = aten.view.default(clone, [4, 4])
    t_1: "f32[4, 4]{1, 4}" = aten.t.default(view_1)
    z: "f32[8, 4]" = aten.mm.default(y, t_1)
    turn: "(f32[8, 4])" = yield [z], [0]
    # backward: fc2
    start_all_gather_2: "f32[8, 2]" = geminifx.start_all_gather(w2, 'tp', 2)
    # backward
    tangent: "f32[8, 4]" = turn[0]
    # backward: fc1
    start_all_gather_3: "f32[4, 4]" = geminifx.start_all_gather(w1, 'tp', 2)
    # backward: fc2
    finish_collective_2: "f32[8, 2]" = geminifx.finish_collective(start_all_gather_2, w2)
    view_2: "f32[2, 4, 2]" = aten.view.default(finish_collective_2, [2, 4, 2])
    permute_1: "f32[4, 2, 2]{2, 8, 1}" = aten.permute.default(view_2, [1, 0, 2])
    clone_1: "f32[4, 2, 2]" = aten.clone.default(permute_1, memory_format=torch.contiguous_format)
    view_3: "f32[4, 4] | on R" = aten.view.default(clone_1, [4, 4])
    dy: "f32[8, 4]" = aten.mm.default(tangent, view_3)
    # backward: fc1
    finish_collective_3: "f32[4, 4] | on R" = geminifx.finish_collective(start_all_gather_3, w1)
    dx: "f32[8, 4]" = aten.mm.default(dy, finish_collective_3)
    return {"gradient:input:0": dx}
