$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
info
