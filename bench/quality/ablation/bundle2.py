import json, sys, time, os, torch
HERE=os.path.dirname(os.path.abspath(__file__)); sys.path.insert(0, HERE)
import texts, policies
from model import Model
from compare import Bench, describe
t0=time.time()
OUT=os.environ.get("OUT","/tmp"); LIMIT=float(sys.argv[1]); device=sys.argv[2]; me=int(sys.argv[3]); CL=sys.argv[4]
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32=True
M=Model(os.environ.get("MODEL","examples/byte_lm/model"),device)
P,W,E,R=policies.Policy,policies.Window,policies.Express,policies.Scored
far=json.load(open(HERE+"/profile.json"))["far_mass"]
def X(b,**k): return lambda *a:E(*a,b,**k)
def Wd(b,**k): return lambda *a:W(*a,b,**k)
def Sc(b,kind): return lambda *a:R(*a,b,kind)
def O(D=1.,p=3.,**k): return dict(budgets="online",distance=D,power=p,**k)
N=dict(sink_far=False)
exec(open(os.path.join(HERE,os.environ.get("LIST","list2.py"))).read())  # RUNS: [(set, name, maker)]
sets={}
for st,nm,f in RUNS:
    mark=os.path.join(CL,"%s %s"%(st,nm.replace("/","_")))
    try: os.close(os.open(mark,os.O_CREAT|os.O_EXCL))
    except FileExistsError: continue
    if time.time()-t0>LIMIT: print("deadline before",st,nm); break
    if st not in sets:
        d=torch.load(os.path.join(HERE,"data-%s.pt"%st)); n,np_,nf=SETS[st]
        sets[st]=Bench(M,texts.Set([bytes(x) for x in d["plain"]][:np_],[(bytes(t),a) for t,a in d["facts"]][:nf],n),open(OUT+"/w%d.jsonl"%me,"a"),st,t0+LIMIT)
    try: p,_=sets[st].run(nm,f)
    except Exception as e: print(nm,repr(e)[:200],flush=True); continue
    if p is not None and getattr(p,"history",None):
        open(OUT+"/h%d.jsonl"%me,"a").write(json.dumps([st,nm]+[[x,y.int().tolist()] for x,y in p.history[-1:]])+"\n")
    del p
    if device!='cpu': torch.cuda.empty_cache()
print("worker %d done %.1f s"%(me,time.time()-t0))
