$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 1 0 512
sleep 1
quit
read 0 512
