import json, sys, time, os, torch
HERE=os.path.dirname(os.path.abspath(__file__)); sys.path.insert(0, HERE)
import texts, policies
from model import Model, score
from compare import Bench
t0=time.time()
OUT=os.environ.get("OUT","/tmp"); LIMIT=float(sys.argv[1]); device=sys.argv[2] if len(sys.argv)>2 else "cuda"
n=int(os.environ.get("N","16384")); NP=int(os.environ.get("NP","10")); NF=int(os.environ.get("NF","10"))
torch.backends.cuda.matmul.allow_tf32=True
M=Model(os.environ.get("MODEL","examples/byte_lm/model"),device)
data=torch.load(os.path.join(HERE,"data.pt"))
T=texts.Set([bytes(x) for x in data["plain"]][:NP],[(bytes(t),a) for t,a in data["facts"]][:NF],n)
B=Bench(M,T,open(OUT+"/b1.jsonl","a"),"16k",t0+LIMIT)
P,W,E,R=policies.Policy,policies.Window,policies.Express,policies.Scored
far=json.load(open(HERE+"/profile.json"))["far_mass"]
X=lambda b,**k:(lambda *a:E(*a,b,**k))
Wd=lambda b,**k:(lambda *a:W(*a,b,**k))
Sc=lambda b,kind:(lambda *a:R(*a,b,kind))
rec,_=B.run("exact",lambda *a:policies.Recorder(*a),chunk=64 if False else 512)
if rec:
    log=rec.result()  # in order of calls: per chunk, per layer, per block
    nb=512//64; L=M.layers
    log=log.view(-1,L,nb,*log.shape[1:]).transpose(1,2).reshape(-1,L,*log.shape[1:])  # (blocks, L, S, H, D, 3)
    torch.save(log,OUT+"/far.pt")
    own=log[16:,:,:,:,1,0].float().mean(0)  # (L, S, H), beyond 1024
    del rec
O=dict(budgets="online",distance=1.0); PR=dict(budgets="profile",far=far)
b=int(os.environ.get("BB","1024"))
def go(b):
    return [
 ("window equal",Wd(b)),("express profile p2",X(b,**PR)),("window profile p2",Wd(b,**PR)),
 ("online D1 p2",X(b,**O)),("window online D1 p2",Wd(b,**O)),("online D.5 p2",X(b,**O|dict(distance=.5))),
 ("snapkv",Sc(b,"snapkv")),("keydiff",Sc(b,"keydiff"))]
runs=go(b)+[
 ("express equal",X(b)),
 ("own far p2",lambda *a:E(*a,b,budgets="given",far=own)),
 ("online D1 p1.5",X(b,**O,power=1.5)),("online D1 p3",X(b,**O,power=3.)),
 ("online D2 p2",X(b,**O|dict(distance=2.0))),
 ("online D1 rms p2",X(b,**O,signal="rms")),("online D1 max p2",X(b,**O,heads="max")),
 ("online D1 p2 cap2",X(b,**O,cap=2.)),
 ("online D1 p2 every512 hl16",X(b,**O,settle=512,half_life=16)),
 ("online D1 p2 every b",X(b,**O,settle=b)),
 ("online D1 p2 shrink.2",X(b,**O,shrink=.2)),
 ("online D1 p2 marginal.5",X(b,**O,marginal=.5)),
 ("online D1 alpha0",X(b,**O,alpha=0.)),("online D1 no coreset",X(b,**O,coreset=False)),
 ("online D1 w.8 p.14",X(b,**O,window=.8,protect=.14)),("online D1 w.4 p.42",X(b,**O,window=.4,protect=.42)),
 ]
for bb in (256,4096): runs+=[("%d: "%bb+nm,f) for nm,f in go(bb)]
runs+=[
 ("online D1 mass half .9",X(b,**O,mass_share=.5,mass_decay=.9)),
 ("online D1 times mass .9",X(b,**O,score="energy times_mass",mass_decay=.9)),
 ("online D1 free",X(b,**O,score="free")),("online D1 value",X(b,**O,score="value")),
 ("online D1 int8",X(b,**O,bits=8)),("online D1 int8 x1.94",X(int(b*1.94),**O,bits=8)),("online D1 4bit g32 turned",X(b,**O,bits=4,group=32,turn=True)),
 ("online D1 base.2",X(b,**O,base=.2)),
]
for bb in (512,2048): runs+=[("%d: "%bb+nm,f) for nm,f in go(bb)]
runs+=[("h2o",Sc(b,"h2o"))]
for nm,f in runs:
    try: p,_=B.run(nm if ":" in nm else "%d: "%b+nm,f)
    except Exception as e: print(nm,repr(e)[:300]); continue
    if p is not None and getattr(p,"history",None) and "online D1 p2" in nm:
        h=p.history; json.dump([nm]+[[x,y.int().tolist()] for x,y in h],open(OUT+"/hist-%d.json"%len(os.listdir(OUT)),"w"))
        if hasattr(p,"ratio"): print([[round(z,2) for z in y] for y in p.ratio[2].tolist()])
    if p is None: print("deadline before",nm); break
    del p
print("total %.1f s"%(time.time()-t0), "peak %.1f GB"%(torch.cuda.max_memory_allocated()/1e9 if device!="cpu" else 0))
