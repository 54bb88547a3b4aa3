import sys, os, torch
import texts
D="/work/shared/lm/dev.txt"; MR="/work/shared/lm/make_recall.py"
n=int(sys.argv[1]); out=sys.argv[2]
k=n//1024
cases=[texts.read_case("/work/shared/lm/recall/dev-%dk-%d"%(k,i)) for i in range(4 if k<32 else 2)]
cases+=texts.facts(D,n,12-len(cases),n//1024,MR)
torch.save({"plain":[list(x) for x in texts.plain(D,n,14)],"facts":[(list(t),a) for t,a in cases]},out)
