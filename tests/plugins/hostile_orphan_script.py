"""A parent starts the real process, dies while it replays; does the orphan still write a snapshot?"""
import os, subprocess, sys, time, signal, pathlib
sys.path[:0]=["/tmp/wt-hostile","/tmp/wt-hostile/tests"]
import shutil; shutil.rmtree("/tmp/t-orphan", ignore_errors=True)
from journals import graph
from tests.plugins.test_hostile import write
store=pathlib.Path("/tmp/t-orphan/store"); store.mkdir(parents=True, mode=0o700)
local,lsn=write(store,*[graph("C",n+1,{f"k{n}-{i}":[f"k{n}-{i-1}"] if i else [] for i in range(1000)}) for n in range(40)])
parent=subprocess.Popen([sys.executable,"-c",f"import subprocess,sys,time; subprocess.Popen([sys.executable,'-m','dask_resilience.plugins.snapshot_process','{local.url}','{lsn}','1']); time.sleep(100)"],env={**os.environ,"PYTHONPATH":sys.argv[1]+":/tmp/wt-hostile/tests"},cwd="/")
time.sleep(float(sys.argv[2])); parent.kill(); parent.wait(); t=time.time()
from dask_resilience.storage.snapshots import list_snapshots
while time.time()-t<20 and not list_snapshots(local): time.sleep(.2)
print("orphan finished its snapshot:", list_snapshots(local), "after", round(time.time()-t,1),"s", local.list("snapshot-data/"))
