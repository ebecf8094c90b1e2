$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
read 4M 1
read 4095k 2k
write 4M 1
write 8M 512
discard 4M 64k
write -z 4M 64k
read -P 0 4095k 1k
